"""Operations of hybrid language models. Imports torch (and, where there is a GPU, triton); never archsearch.

Layout everywhere: [B, T, H, D]; recurrent state [B, H, K, V] in fp32; decays as logarithms. Each operation is a
folder whose `reference.py` holds the truth (a loop over tokens) and the chunkwise form in plain torch.
"""
