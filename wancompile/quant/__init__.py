"""8-bit numbers: the quantized tensor, the reference arithmetic, and calibration statistics."""
