"""Number formats: tensor in, tensor out. No module of the model is known here.

mxfp4.py    4-bit floats, 32 to a block with one power-of-two scale: the format of GPT-OSS experts
integer.py  int8 and int4 with one scale (and, when affine, one zero point) a group
low_rank.py two thin factors in place of a matrix, plain or fitted to the inputs
packed.py   PackedWeight: a stack of expert matrices in any of these forms
compound.py factors that are packed, and stacks whose experts differ in form
"""
