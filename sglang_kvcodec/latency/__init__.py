"""Time to the first token, measured on real SGLang servers around a link of known bandwidth, and pictured.

Nothing here imports torch or SGLang: servers are processes, or run elsewhere.
"""
