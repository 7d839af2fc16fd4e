"""Everything that reads or writes weights.

wording.py         words that messages share
json_file.py       a JSON file, read with every mishap as one sentence
shard_header.py    where each tensor of a safetensors file stands, checked and made
shard_reader.py    tensors of a folder of safetensors files, lazily read
shard_writer.py    tensors written file by file, or copied there row by row
layouts.py         what each layout calls the model's tensors, as tables that work in both directions
config_keys.py     the keys of config.json, looked up by any of their spellings
layer_experts.py   how many experts each layer has by the word of a config.json
config_reading.py  config.json in all its spellings -> ModelConfig
config_writing.py  ModelConfig -> config.json, in the words of each layout
sidecars.py        the small files beside the weights
forms.py           in which form a native checkpoint holds an expert weight
hub.py             "org/name" or a folder -> a local folder
opened.py          Checkpoint: a folder whose every tensor has been accounted for, read under the model's own names
projections.py     attention's projections and the unembedding rounded to int8, for decoding
huge_pages.py      weights moved into huge pages, for decoding
export.py          what a checkpoint will consist of in a given layout, and the writing of it
weights.py         load, save, convert, stream_layers
adapters.py        adapters on disk, and merged into the weights they stand beside
train_state.py     the resume point of a training run
"""
