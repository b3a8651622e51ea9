"""The forms that weights can be brought into when a model is converted."""

QUANTIZED_BITS = {"q2": 2, "q3": 3, "q4": 4, "q5": 5, "q6": 6, "q8": 8, "mxfp4": 4}
FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
FORMS = (*QUANTIZED_BITS, *FLOATS)
GROUP_SIZES = (32, 64, 128)
MXFP4_GROUP_SIZE = 32
