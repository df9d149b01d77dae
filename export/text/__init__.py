"""The text tower and tokenizer of a bundle with an open vocabulary."""
