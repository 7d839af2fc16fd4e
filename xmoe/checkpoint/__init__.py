"""Everything that reads or writes weights.

shards.py        tensors of a folder of safetensors files: lazily read, copied row by row, written file by file
layouts.py       what each layout calls the model's tensors, as tables that work in both directions
config_files.py  config.json in all its spellings <-> ModelConfig
opened.py        Checkpoint: a folder whose every tensor has been accounted for, read under the model's own names
weights.py       load, save, convert, stream_layers
hub.py           "org/name" or a folder -> a local folder
train_state.py   the resume point of a training run
"""
