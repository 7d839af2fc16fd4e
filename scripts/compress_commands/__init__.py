"""What `python scripts/compress.py COMMAND` does, in the order of the story. torch comes late: --help need not wait for it.

flags.py   flags that several commands share
inputs.py  what those flags name, opened
watch.py   record, import, fingerprint: what the routers of a model do
decide.py  plan, sweep: who stays, and what that costs
cut.py     prune, verify: the smaller checkpoint, and the proof of it
change.py  merge, reduce, recover: weights that were not in the source
"""
