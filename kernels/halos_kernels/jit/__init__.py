"""The Triton kernels, and nothing else: importing this package needs Triton. Their hosts stand one level up."""
