"""How a model's calibration is made: statistics of its KV, bases, steps. ``kvcodec calibrate`` and servers use it."""
