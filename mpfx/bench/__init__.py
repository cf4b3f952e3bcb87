"""Measurements that README's figures come from: quality of the defaults, time of one layer, time of a whole model."""
