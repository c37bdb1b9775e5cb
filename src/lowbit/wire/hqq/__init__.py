"""HQQ: the wire, and the tensors of one weight."""
