"""Comparison of methods: each arm trains and tests in separate processes; tables and figures follow."""
