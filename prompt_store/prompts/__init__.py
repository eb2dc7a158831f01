"""Tasks, soft prompts and their versions: the documents, the tensor codec and the registry that stores them."""
