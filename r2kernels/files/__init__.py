"""Checkpoints that are read, and palettized files that are written and read.

checkpoint      reads .safetensors and files of torch.save
folders         reads folders of Hugging Face, and checkpoints in shards
paths           files opened to be read, and put in place as a whole or not at all
container       safetensors files byte by byte, and their checksums
format          what is in a palettized file
saving          writes one: `save_palettized`, `save_quantized`
loading         reads one: `load_palettized`, and any checkpoint: `opened`
clustered       a weight as codes and look-up tables
uniform         a weight as codes, scale and zero point
packing         codes of 1 to 8 bits as bytes
huffman         codes as a Huffman stream
integers        weights and activations as integers, scales and zero points
onnx            a traced model with those in ONNX
coreml          clustered weights as coremltools has them
"""
