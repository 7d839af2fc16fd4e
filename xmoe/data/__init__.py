"""Text becomes token batches: where it comes from, how it is cut into documents, its tokens, and their order.

Read in this order: `sources` (where text is), `documents` (how it is cut), `tokenizer` (text <-> ids), `tokens` (documents
-> one long array of ids, kept on disk), `stream` (array -> training and validation batches), `calibration` (text -> batches
to measure on).
"""
