"""How fast the pair decodes, beside the target alone and the programs that people would use instead."""
