"""Fast implementations of single operations. Each package chooses its backend in its __init__ alone."""
