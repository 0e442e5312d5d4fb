"""How the test model is made and measured: its text, its training, its loss and the n-gram model it is held against."""
