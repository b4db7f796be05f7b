"""``x @ weight.T + bias`` on a packed INT8 weight; see ``hfquant.kernels.linear_op`` for arguments and gradient."""

from hfquant.kernels.int8_linear.reference import int8_linear_reference
from hfquant.kernels.linear_op import define_linear


int8_linear = define_linear("int8_linear", int8_linear_reference, bits=8)
