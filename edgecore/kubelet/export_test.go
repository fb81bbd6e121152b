package kubelet

import "time"

// HurryAddress has k notice a changed address sooner than a node should.
func HurryAddress(k *Kubelet, period, settle time.Duration) {
	k.addressPeriod, k.addressSettle = period, settle
}
