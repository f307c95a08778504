"""Weight clustering for PyTorch, from a trained model to the compressed int8 file."""
