"""What is true of every process of ours: its errors, its child processes, why it did not start."""
