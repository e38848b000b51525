"""`sdtpu demo`: the whole way from prompts to images on one machine."""
