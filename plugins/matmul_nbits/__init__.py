"""cpm.MatMulNBits: y = x . dequantize(w)^T for weights of 2, 4 or 8 bits (com.microsoft's contract)."""
