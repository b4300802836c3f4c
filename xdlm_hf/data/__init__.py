"""Training data: documents and conversations to rows and batches.

readers        documents from files and the Hub
tokenizer      special tokens, training, checks
packing        rows of one length
source_files   local files of a stream, and their changes between runs
stream         rows packed while documents are read, with a resumable state
conversations  chat templates, prompts and answers as rows
collator       rows to batches
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
