"""From a clustered PyTorch model to an int8 TFLite file, and what Vela makes of it."""
