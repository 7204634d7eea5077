"""LoRAs on a compiled model: as branches of low rank beside its linears, or merged into them.

| file | what it knows |
|---|---|
| `files` | the ways in which LoRAs are stored, as one |
| `adapter` | a LoRA: two factors for each linear that it changes |
| `places` | where in a compiled program the weight of a linear is |
| `branches` | the LoRAs that a model has, and the program that computes with them |
| `merge` | weights rounded anew with a LoRA in them |
"""
