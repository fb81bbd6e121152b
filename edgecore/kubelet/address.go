package kubelet

import (
	"context"
	"errors"
	"net"
)

// ErrAddressChanged ends Run when the address the node was started with is gone
// and another one can be reported: the kubelet takes its address at start only,
// so the process must be restarted. Pods do not notice.
var ErrAddressChanged = errors.New("kubelet: the node's address changed; restart the process")

func (k *Kubelet) chooseAddress() net.IP { return k.cfg.NodeIP }

func (k *Kubelet) watchAddress(ctx context.Context, current net.IP, cancel context.CancelCauseFunc) {}
