"""The systems of the papers, side by side: scales, texts, rows and the commands that make them."""
