"""From a checkpoint to the Hugging Face Hub: the exported folder, its model card, the push."""
