"""What several recipes share: flags, data sources, keyed sampling and augmentation, the loop, the run folder, plots."""
