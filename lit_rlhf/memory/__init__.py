"""What a run will hold in memory: its own code is run on tensors without storage, and their bytes are counted."""
