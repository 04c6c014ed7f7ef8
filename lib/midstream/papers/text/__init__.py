"""Part: training and decoding text."""
