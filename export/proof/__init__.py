"""Check an exported graph against the torch model."""
