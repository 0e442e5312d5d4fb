"""Contract suites for the interfaces."""
