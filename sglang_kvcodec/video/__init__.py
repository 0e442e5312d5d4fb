"""Picture codecs: one interface, several backends."""
