# shellcheck shell=bash disable=SC2034
# Settings of your cluster. Copy this file to slurm/site.sh and edit it, or start from an empty file. All Slurm scripts source
# slurm/site.sh first, on the login node and in the job. You need no site.sh if torchrun is on PATH or `make install` has
# created .venv.

# -- the Python environment: use one of these
# module load python/3.11 cuda/12.6
# source "$HOME/miniconda3/etc/profile.d/conda.sh" && conda activate ddp_cifar
# source "$HOME/ddp_cifar/.venv/bin/activate"

# -- sbatch defaults, for scripts that call sbatch themselves (slurm/train.sh ... -- ..., slurm/chain.sh, slurm/sweep.sh)
# export SBATCH_ACCOUNT=my_account SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=8:00:00

# -- the network interfaces between nodes (`ip -br address` lists the interfaces of a node)
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # IP over InfiniBand, or the fast Ethernet: eth1, ens5 ...
# export NCCL_IB_HCA=mlx5                                # the InfiniBand adapters to use, if some are reserved for storage
# export NCCL_IB_DISABLE=1                               # if InfiniBand is present but does not work

# -- more options for srun, for example for a container (docs/containers.md)
# srun_options=(--container-image="$HOME/ddp_cifar.sqsh" --container-mounts="$HOME:$HOME")
