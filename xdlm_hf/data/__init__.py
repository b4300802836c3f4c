"""Training data: documents and conversations to rows and batches.

readers        documents from files and the Hub
tokenizer      special tokens, training, checks
packing        rows of one length
source_files   local files of a stream, and their changes between runs
stream         rows packed while documents are read, with a resumable state
wrapping       rows with boundary tokens, and the released cutting
detokenizers   benchmark text back to plain text
text8          its parts and its character tokenizer
corpora        the paper's corpora, from the Hub or local files
conversations  chat templates, prompts and answers as rows
images         images to token ids and back: pixels, or codes of a VQ tokenizer
image_tokens   image datasets to datasets of token ids
llamagen       names and sizes of LlamaGen's VQ tokenizer in diffusers
patch_vq       a VQ tokenizer of image patches, without a network
collator       rows to batches
"""
