"""From a store to the microbatches of a rank: order, batch, plan, tensors."""
