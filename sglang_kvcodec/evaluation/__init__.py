"""What a way of coding KV costs and what it gains: bytes, and what the model says with the KV that comes back.

Every method goes through the same documents, beside uncoded bf16 and the ways others code KV.
"""
