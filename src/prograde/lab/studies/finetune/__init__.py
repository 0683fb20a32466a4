"""`prograde finetune`: fine-tunes a language model by forward gradients."""
