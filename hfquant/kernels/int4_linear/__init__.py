"""``x @ weight.T + bias`` on a packed INT4 weight; see ``hfquant.kernels.linear_op`` for arguments and gradient."""

from hfquant.kernels.int4_linear.reference import int4_linear_reference
from hfquant.kernels.linear_op import define_linear


int4_linear = define_linear("int4_linear", int4_linear_reference, bits=4)
