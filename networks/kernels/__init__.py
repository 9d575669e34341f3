"""Hand-written derivatives of the ConvNet's layers."""
