"""`kfac` and `scale_by_kfac`: their steps and their state."""
