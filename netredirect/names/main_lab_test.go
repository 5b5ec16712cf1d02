//go:build lab

package names

import (
	"testing"

	"github.com/wanmig/wanmig/netredirect/internal/testnet"
)

// Addresses of the lab's servers. They are on lo of the tests' network
// namespace.
const (
	primaryAddr   = "10.77.0.1"
	secondaryAddr = "10.77.0.2"
	primaryAddr6  = "fd77::1"
	mutedAddr     = "10.77.0.3" // nothing listens there
)

func TestMain(m *testing.M) {
	testnet.Main(m, `for i in `+primaryAddr+" "+secondaryAddr+" "+mutedAddr+`; do ip addr add $i/32 dev lo; done
		ip addr add `+primaryAddr6+`/128 dev lo nodad`)
}
