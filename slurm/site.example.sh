# shellcheck shell=bash disable=SC2034
# What this site needs. Copy it to slurm/site.sh, which the scripts of this folder read first, both where a job is submitted and
# in the job; or start from an empty file. Nothing here is needed where torchrun is on PATH, or `make install` has made .venv.

# -- the environment: one of these
# module load python/3.11 cuda/12.6
# source "$HOME/miniconda3/etc/profile.d/conda.sh" && conda activate ddp_cifar
# source "$HOME/ddp_cifar/.venv/bin/activate"

# -- for slurm/train.sh and slurm/chain.sh run by hand, which submit: sbatch's own variables
# export SBATCH_ACCOUNT=my_account SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=8:00:00

# -- the network: which interfaces the nodes reach each other by (`ip -br address` lists a node's)
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # InfiniBand with IP over it, or the fast Ethernet: eth1, ens5 ...
# export NCCL_IB_HCA=mlx5                                # the InfiniBand adapters to use, where some are for storage
# export NCCL_IB_DISABLE=1                               # where there is InfiniBand that does not work

# -- more options for srun, such as a container's (docs/containers.md)
# srun_options=(--container-image="$HOME/ddp_cifar.sqsh" --container-mounts="$HOME:$HOME")
