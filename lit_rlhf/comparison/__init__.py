"""Methods side by side: runs in processes of their own, then tables and plots."""
