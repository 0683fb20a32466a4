"""`prograde finetune-methods`: methods of fine-tuning compared on one model."""
