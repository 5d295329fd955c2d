"""Every kernel by the estimates of the TPU compiler."""
