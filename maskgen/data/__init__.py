"""Text: where it comes from, how it becomes tokens, and how tokens become windows for calibration and training."""
