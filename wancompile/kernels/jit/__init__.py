"""The Triton code of the kernels, imported by a kernel when it first runs.

Nothing else imports these modules, so wancompile imports on a machine without triton. With
`TRITON_INTERPRET=1` in the environment they run on CPU tensors, which is how they are tested
without a GPU. No kernel here is specialised on, or tuned for, the number of tokens.
"""
