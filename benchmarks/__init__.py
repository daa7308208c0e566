"""What measures speed. Each file runs by itself and prints a Markdown table."""
