"""Text: rows of files, conversations, tokenizers, and which tokens are masked."""
